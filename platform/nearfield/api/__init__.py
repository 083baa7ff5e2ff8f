"""Wire formats (OpenAI, Open Inference Protocol) and the one neutral request they all become."""
