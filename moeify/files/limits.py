"""The limits on what is read, each far above the largest real model, so that no file can take all memory or time."""

from __future__ import annotations

CONFIG_BYTES = 8_000_000  # largest: 0.6 MB, image classifiers that name 21,843 labels twice
CONFIG_VALUES = 500_000  # largest: 44,000, of the same
INDEX_BYTES = 128_000_000  # largest: 17 MB, 180,000 tensors of an MoE with 384 experts
HEADER_BYTES = 100_000_000  # largest: 25 MB, the same in one file; the safetensors library has this limit too
PLAN_BYTES = 64_000_000  # largest: 0.2 MB, 126 layers
INPUTS_BYTES = 64_000_000  # example inputs; largest: a few values for each of 100,000 tokens
CARD_BYTES = 8_000_000  # a README.md; largest: about 1 MB
YAML_BYTES = 200_000  # a recipe, or the front matter of a README.md; largest: about 100,000, of results
SIDE_FILE_BYTES = 256_000_000  # largest: 33 MB, the tokenizer.json of 262,000 tokens

JSON_DEPTH = 64  # largest: about 8, a config of several models with rotary settings
JSON_VALUES = 2_000_000  # largest: 1.4 million, the header of 180,000 tensors
VOCABULARY_VALUES = 10_000_000  # of a tokenizer.json; largest: 1.8 million, of 262,000 tokens
JSON_DIGITS = 300  # in a row; a float64 has 17, and 309 before its point at most
TENSOR_DIMENSIONS = 64  # largest: 5, a convolution over video; torch has this limit too

LAYERS = 10_000  # largest: 1,000, a research model; 126 in use
HEADS = 8_192  # largest: 128
EXPERTS = 8_192  # largest: 2,048, a Switch Transformer
SIZES = 10_000_000  # of a dimension; largest: 1.44 million, samples of a piece of speech; 500,000 words
LABELS = 100_000  # largest: 21,843; transformers names each twice in a config that it writes
INPUT_ELEMENTS = 100_000_000  # of an example input; largest: 50 million, 16 frames of 1024 x 1024 pixels
RUN_BYTES = 512_000_000  # the log of a run; largest: 40 MB, 1,000 windows of 48 layers with 128 experts
TEXT_BYTES = 1_000_000  # of a text to run models on, of which 512 tokens are used
GGUF_ENTRIES = 1_000_000  # keys, and tensors; largest: about 60 and 2,000
