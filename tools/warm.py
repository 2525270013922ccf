"""What the server of processes in `test_faults.py` has loaded before it forks: a fault then costs a second or two,
not ten."""

import gc

import einops._torch_specific  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import PIL.JpegImagePlugin  # noqa: F401
import PIL.PngImagePlugin  # noqa: F401
import sklearn.cluster  # noqa: F401
import sklearn.decomposition  # noqa: F401
import sklearn.manifold  # noqa: F401
import torch._dynamo  # noqa: F401
import tyro  # noqa: F401

import msinet.cli  # noqa: F401
import msinet.entries  # noqa: F401
import msinet.quickstart  # noqa: F401
from msinet.backbones import timm_tools

timm_tools()

# so that processes neither walk through these objects nor copy their pages
gc.collect()
gc.freeze()
