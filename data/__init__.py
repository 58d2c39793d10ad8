"""The tiny world, its base model, the methods and the evidence."""

import os

# A thread that waits for others soon goes to sleep instead of spinning. This works only if it is set before torch is
# imported; every command comes by here first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
