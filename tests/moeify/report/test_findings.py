from __future__ import annotations

from dataclasses import replace

from moeify.report.data import Curve, Training
from moeify.report.findings import findings
from tests.moeify.report import small


def test_what_is_wrong_is_said_with_its_place() -> None:
    said = findings(small.report())
    assert said[0] == "1 of 6 experts got no token of this text: expert 0 of layer 0."
    assert said[1].startswith(
        "1 of 6 experts took more than 2 times their fair share; the busiest is expert 2 of layer 0"
    )
    assert said[2] == "12.50% of all choices found their expert full and were dropped."
    assert said[-2] == (
        "It differs from the dense model: 1 layers were compared now. After training that is as it should be."
    )
    assert said[-1] == "A token meets 500 of 1.0k parameters (50%)."


def test_what_is_right_is_said_too() -> None:
    made = small.report()
    even = tuple(small.routing(layer.name, (1.0, 1.0, 1.0)) for layer in made.routing)
    fresh = tuple(replace(layer, entropy=0.99, dropped=0.0) for layer in even)
    copies = tuple(replace(layer, farthest=(0, 1, 1.0)) for layer in made.weights)
    proofs = (replace(made.proofs[0], passed=True),)
    said = findings(replace(made, routing=fresh, weights=copies, proofs=proofs))
    assert said[:4] == (
        "Every expert got at least one token of this text: none is dead.",
        "No expert took more than 2 times its fair share; the busiest is expert 0 of layer 0, with 1.",
        "The routers have hardly decided anything, as fresh ones: their entropy is 99.0% of the largest.",
        "All experts of a layer hold equal weights: they are copies that training has not moved yet.",
    )
    assert said[4].startswith("It computes what the dense model computes, up to rounding")
    promised = findings(replace(made, proofs=(replace(proofs[0], tolerance=None),)))
    assert any(sentence.startswith("Its method promises no equality") for sentence in promised)
    assert any(
        sentence.startswith("Nothing says that it was compared") for sentence in findings(replace(made, proofs=()))
    )


def test_a_run_is_told_from_its_ends() -> None:
    curves = (
        Curve("loss", (5.0, None, 4.0)),
        Curve("busiest expert", (3.0, 1.5)),
        Curve("experts without a token", (2.0, 1.0)),
        Curve("dropped choices", (0.5, 0.25)),
    )
    said = findings(replace(small.run_report(), training=Training((1, 2, 9), curves, (), (), 3)))
    assert said == (
        "The loss went from 5 to 4 in 9 steps.",
        "A layer's busiest expert took 3 times its fair share at first, 1.5 last.",
        "1 experts got no token in the last window, 2 in the worst.",
        "25.00% of the choices were dropped in the last window.",
    )
