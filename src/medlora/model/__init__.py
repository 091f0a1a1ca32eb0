"""The base model and its adapter: resolve -> check -> load -> LoRA."""
