"""Rows in, token ids and labels out: sources -> split -> prompts -> fit -> dataset."""
