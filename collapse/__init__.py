"""Code that the training scripts share, in layers."""

import logging

# transformers imports it where it is installed, and on a CPU it warns of a missing kernel that
# nothing here calls.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
