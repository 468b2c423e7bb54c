"""What several systems are made of: encoders, language models, adapters, decoding."""
