"""For developers: finding, installing and starting a ComfyUI, training the demo models, pictures."""
