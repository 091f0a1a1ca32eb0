"""Ask the untuned and the tuned model, from one loaded base."""
