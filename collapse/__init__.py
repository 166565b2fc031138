"""What the training scripts share. Imported before torch, for the setting below."""

import os

# Steps differ in length: in segments that grow, freed memory fits a step of any size.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
