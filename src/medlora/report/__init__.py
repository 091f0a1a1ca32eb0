"""What a run came to: one page that a clinician can read, and several runs side by side."""
