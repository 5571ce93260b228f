"""What happened to every MoE-looking site of a model, as values, as text, as JSON and as a picture."""
