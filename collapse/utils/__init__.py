"""What every floor uses: errors, device, files, the hub, provenance."""
