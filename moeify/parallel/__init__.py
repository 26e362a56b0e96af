"""Expert parallelism in any script: every rank holds some of the experts, and tokens travel to them."""
