"""What the training scripts share, from floor to floor."""

import logging

# transformers imports it where it is installed, and on a CPU it warns of a missing kernel that
# nothing here calls.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
