// A browser starts no worker for a page that it reads from the disk. There the search runs in a hidden frame instead.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      this.ready = new Promise((done) => (this.frame.onload = done));
      inside.document.open();
      inside.document.write(
        `<script>postMessage = (data) => parent.postMessage(data, "*")<\/script><script src="${url}"><\/script>`,
      );
      inside.document.close();
      addEventListener("message", ({ source, data }) => {
        if (source === inside) this.dispatchEvent(new MessageEvent("message", { data }));
      });
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
