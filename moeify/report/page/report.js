document.documentElement.classList.add("js");
const tip = document.getElementById("tip");
const say = (text, x, y) => {
  tip.textContent = text;
  tip.style.left = Math.min(x + 12, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = (y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18) + "px";
};
// A cell's number is read from the table behind the map.
for (const svg of document.querySelectorAll("svg[data-table]")) {
  const [across, down] = svg.dataset.size.split(" ").map(Number);
  const show = event => {
    const box = svg.getBoundingClientRect();
    const column = Math.min(across - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * across)));
    const row = Math.min(down - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * down)));
    const table = document.getElementById(svg.dataset.table), cells = table.tBodies[0].rows[row].cells;
    const heads = table.tHead.rows[0].cells;
    say(`${svg.dataset.row} ${cells[0].textContent}, ${svg.dataset.column} ${heads[column + 1].textContent}: ${cells[column + 1].textContent}`,
        event.clientX, event.clientY);
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { tip.textContent = "" });
}
const data = document.getElementById("choices");
if (data) {
  const layers = JSON.parse(data.textContent), tokens = [...document.querySelectorAll(".passage ruby")];
  const slider = document.getElementById("layer"), name = document.getElementById("layer-name");
  const paint = () => {
    const layer = layers[slider.value];
    name.textContent = layer.name;
    tokens.forEach((token, n) => {
      const experts = layer.experts[n] || [];
      token.style.setProperty("--h", experts.length ? (experts[0] * 137.508) % 360 : 0);
      token.lastElementChild.textContent = experts.length ? experts[0] : "–";
      token.dataset.tip = experts.map((expert, k) => `expert ${expert}  ${layer.weights[n][k].toFixed(3)}`).join("\n") || "no expert";
    });
  };
  tokens.forEach(token => token.removeAttribute("title"));
  slider.addEventListener("input", paint);
  const passage = document.querySelector(".passage");
  const hover = event => {
    const token = event.target.closest("ruby");
    token ? say(token.dataset.tip, event.clientX, event.clientY) : tip.textContent = "";
  };
  passage.addEventListener("pointermove", hover);
  passage.addEventListener("pointerdown", hover);
  passage.addEventListener("pointerleave", () => { tip.textContent = "" });
  paint();
}
