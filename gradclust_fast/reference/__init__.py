"""Pure PyTorch versions of every op: the definition of correct."""

from . import conv_dot as conv_dot
from . import conv_gram as conv_gram
from . import conv_moments as conv_moments
from . import conv_sketch as conv_sketch
from . import conv_sqnorm as conv_sqnorm
from . import grad_sqnorm as grad_sqnorm
