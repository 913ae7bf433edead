"""What a frozen model says about data: streaming passes that initialisers and masks are made from.

`gradient_pass` gives the mean full gradient of chosen weights, `activation_pass` reduces what
chosen sites read. Both leave the model exactly as it was: parameters, `requires_grad`, gradients,
training flags, active adapters and the random state.
"""

from plait.statistics.activations import Reducer, activation_pass
from plait.statistics.gradients import gradient_pass
from plait.statistics.reducers import InputSVD, SecondMoment, Sketch

__all__ = [
    "InputSVD",
    "Reducer",
    "SecondMoment",
    "Sketch",
    "activation_pass",
    "gradient_pass",
]
