"""One measurement of pyDVL's Dask calculator, by its own environment: runner_pydvl.py SPEC.json OUT.json."""

import json
import sys
import time
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path

warnings.simplefilter("ignore")
import cloudpickle  # noqa: E402
import dask.array as da  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from distributed import Client, LocalCluster  # noqa: E402
from pydvl.influence import DaskInfluenceCalculator  # type: ignore[import-not-found]  # noqa: E402
from pydvl.influence import torch as peer  # noqa: E402
from pydvl.influence.torch.util import TorchNumpyConverter  # type: ignore[import-not-found]  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402


def cpu_seconds() -> float:
    """Of this process and its children, so far."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def main() -> None:
    """Fit and compute; wall and CPU seconds of all processes, and the matrix."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    models = SourceFileLoader("models", spec["models"]).load_module()
    cloudpickle.register_pickle_by_value(models)  # its workers have no such module
    model = models.build(spec["model"])
    model.load_state_dict(torch.load(spec["state"], weights_only=True))
    (x, y), (xt, yt) = models.train_samples(), models.query_samples()
    loss, mode = torch.nn.functional.cross_entropy, peer.SecondOrderMode.HESSIAN
    if spec["method"] == "nystroem":
        influence = peer.NystroemSketchInfluence(
            model, loss, regularization=spec["damping"], rank=spec["rank"], second_order_mode=mode
        )
    else:
        influence = peer.CgInfluence(
            model,
            loss,
            regularization=spec["damping"],
            rtol=spec["rtol"],
            atol=0.0,
            solve_simultaneously=True,
            second_order_mode=mode,
        )
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        models.warm()
        client.run(models.warm)
        start, before = time.perf_counter(), cpu_seconds()
        influence.fit(DataLoader(TensorDataset(x, y), batch_size=spec["chunk"]))
        calculator = DaskInfluenceCalculator(influence, TorchNumpyConverter(device=torch.device("cpu")), client)
        chunks = spec["chunk"]
        arrays = [da.from_array(t.numpy(), chunks=(chunks, *t.shape[1:])) for t in (x, y)]
        tests = [da.from_array(t.numpy(), chunks=(spec["test_chunk"], *t.shape[1:])) for t in (xt, yt)]
        if spec["route"] == "influences":
            lazy = calculator.influences(*tests, *arrays)
        else:
            factors = calculator.influence_factors(*tests).persist()
            lazy = calculator.influences_from_factors(factors, *arrays)
        scores = np.asarray(lazy.compute())
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    np.save(spec["scores"], scores)
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds, "cpu": cpu}))


if __name__ == "__main__":
    main()
