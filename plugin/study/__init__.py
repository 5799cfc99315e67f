"""What a training run is asked to do: settings from flags, files and presets, made ready as a job."""
