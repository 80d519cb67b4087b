"""Pure PyTorch versions of every op: the definition of correct."""

from . import assign as assign
from . import assign_points as assign_points
from . import cluster_sums as cluster_sums
from . import conv_dot as conv_dot
from . import conv_gram as conv_gram
from . import conv_moments as conv_moments
from . import conv_sketch as conv_sketch
from . import conv_sqnorm as conv_sqnorm
from . import conv_weight_sqnorm as conv_weight_sqnorm
from . import embedding_dot as embedding_dot
from . import embedding_gram as embedding_gram
from . import embedding_moments as embedding_moments
from . import embedding_sketch as embedding_sketch
from . import embedding_sqnorm as embedding_sqnorm
from . import exact_moves as exact_moves
from . import grad_dot as grad_dot
from . import grad_gram as grad_gram
from . import grad_moments as grad_moments
from . import grad_quantities as grad_quantities
from . import grad_sketch as grad_sketch
from . import grad_sqnorm as grad_sqnorm
from . import grad_weight_sqnorm as grad_weight_sqnorm
from . import norm_grads as norm_grads
from . import sign_product as sign_product
