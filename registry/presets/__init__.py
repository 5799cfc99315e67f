"""Named configurations, one YAML file each."""
