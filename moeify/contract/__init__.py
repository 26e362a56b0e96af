"""What transformers expects of a Mixture-of-Experts, kept by converted models of any architecture, and used on its own.

`stock_experts` computes the experts of transformers' models by our operator, `model` makes a converted model one that
its tools take for an MoE, and `outputs` gives it router logits and an auxiliary loss.
"""
