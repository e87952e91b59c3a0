"""The demo: the whole job on a small trained model that comes with the package.

``text`` gives its text, ``train`` made the model, ``walkthrough`` runs the demo.
"""

from lutra.demo.walkthrough import run

__all__ = ["run"]
