"""Which experts a token goes to, what keeps them in use, and how many tokens each takes: functions on tensors."""
