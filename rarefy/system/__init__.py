"""The machine underneath: files, progress, memory, strict JSON, processors."""
