from __future__ import annotations

import pytest

import moeify
from moeify.config.choice import find, words
from moeify.routers.noisy_topk import NoisyTopk


def test_words_are_the_files_but_those_that_hold_what_is_shared() -> None:
    assert words("moeify.methods") == ("copy", "drop", "noise")
    assert {"base", "parts"}.isdisjoint(words("moeify.routers"))


@pytest.mark.parametrize("package", ["methods", "routers"])
def test_every_word_has_its_class_which_knows_the_word(package: str) -> None:
    for word in words(f"moeify.{package}"):
        found = find(f"moeify.{package}", word)
        assert getattr(getattr(moeify, package), found.__name__) is found
        assert found().name == word if word != "hash" else found(vocab_size=2).name == word


def test_a_class_is_found_by_its_own_name_alone() -> None:
    assert moeify.routers.NoisyTopk is NoisyTopk
    for name in ("Noisytopk", "NOISY_TOPK", "Base", "Oracle", "oracle", "_Softmax"):
        with pytest.raises(AttributeError, match=f"module 'moeify.routers' has no attribute '{name}'"):
            getattr(moeify.routers, name)
