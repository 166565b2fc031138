"""Used by every layer: errors, device, files, the hub, provenance."""
