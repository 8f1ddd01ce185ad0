"""Kronecker-factored quasi-Newton optimizers for Flax models, as Optax transformations."""

from kfqn_optax._alias import kbfgs as kbfgs
from kfqn_optax._alias import kbfgs_l as kbfgs_l
from kfqn_optax._alias import kfac as kfac
from kfqn_optax._alias import kfqn as kfqn
from kfqn_optax._capture.call import without_slots as without_slots
from kfqn_optax._capture.curvature import Curvature as Curvature
from kfqn_optax._capture.find_layers import find_layers as find_layers
from kfqn_optax._capture.layers import Layer as Layer
from kfqn_optax._capture.layers import Layers as Layers
from kfqn_optax._capture.layers import join_layers as join_layers
from kfqn_optax._capture.nnx_call import merge as merge
from kfqn_optax._capture.outputs import outputs as outputs
from kfqn_optax._capture.quadratic import Forms as Forms
from kfqn_optax._capture.statistics import Statistics as Statistics
from kfqn_optax._capture.value_and_grad import value_and_grad as value_and_grad
from kfqn_optax._capture.weights import weights as weights
from kfqn_optax._diagnostics import LayerReport as LayerReport
from kfqn_optax._diagnostics import Report as Report
from kfqn_optax._diagnostics import SideReport as SideReport
from kfqn_optax._diagnostics import diagnostics as diagnostics
from kfqn_optax._sides.bfgs import bfgs as bfgs
from kfqn_optax._sides.block_inverse import block_inverse as block_inverse
from kfqn_optax._sides.damping import double_damping as double_damping
from kfqn_optax._sides.damping import dp_dlm as dp_dlm
from kfqn_optax._sides.diagonal import diagonal as diagonal
from kfqn_optax._sides.factor import InverseFactor as InverseFactor
from kfqn_optax._sides.factor import PairCounts as PairCounts
from kfqn_optax._sides.fisher import fisher as fisher
from kfqn_optax._sides.group_secant import group_secant as group_secant
from kfqn_optax._sides.hessian_action import hessian_action as hessian_action
from kfqn_optax._sides.lbfgs import lbfgs as lbfgs
from kfqn_optax._sides.minibatch_action import minibatch_action as minibatch_action
from kfqn_optax._sides.secant import secant as secant
from kfqn_optax._sides.side import Side as Side
from kfqn_optax._state import ScaleByKfqnState as ScaleByKfqnState
from kfqn_optax._steps.capped import capped as capped
from kfqn_optax._steps.measured import measured as measured
from kfqn_optax._steps.quadratic import quadratic as quadratic
from kfqn_optax._steps.rule import Outcome as Outcome
from kfqn_optax._steps.rule import Proposal as Proposal
from kfqn_optax._steps.rule import StepRule as StepRule
from kfqn_optax._train_state import TrainState as TrainState
from kfqn_optax._transform import scale_by_kfqn as scale_by_kfqn
from kfqn_optax._warm_start import warm_start as warm_start

__version__ = "0.1.0"
