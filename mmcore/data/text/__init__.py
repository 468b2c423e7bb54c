"""Text as tokens: tokenizers, prompts, chat templates."""
