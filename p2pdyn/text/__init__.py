"""Text at the edge: model cards, chat templates, tokenising and incremental detokenising."""
