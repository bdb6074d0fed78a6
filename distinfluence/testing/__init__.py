"""Contracts that every solver and every curvature operator keeps, for pytest classes to inherit, yours included.

```python
from distinfluence.testing import SolverContract


class TestMine(SolverContract):
    solver, accuracy = MySolver(damping=0.0, rtol=1e-10), 1e-6
```

They need pytest. Call `pytest.register_assert_rewrite("distinfluence.testing")` in your `conftest.py`, before anything
imports this package, to see in a failure what differed.
"""

from distinfluence.testing.operator_contract import OperatorContract
from distinfluence.testing.solver_contract import SolverContract, SolverForm

__all__ = ["OperatorContract", "SolverContract", "SolverForm"]
