"""One run: set up -> train -> save, through TRL's SFTTrainer."""
