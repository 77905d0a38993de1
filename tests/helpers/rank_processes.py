"""Processes that run the same function as ranks of one gloo group, for tests of what several processes do together."""

import io
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT = 30  # seconds; what waits longer for another rank is a hang, and fails


class RankProcesses:
    """Started once for many runs, each in a group of its own: what one leaves behind does not reach the next.

    Args:
        folder: an empty folder, for the files by which the processes find each other.
        size: how many.
        timeout: seconds after which waiting for another rank is a hang, and fails.
    """

    def __init__(self, folder, size=2, timeout=TIMEOUT):
        self._folder, self._runs, self._timeout = folder, 0, timeout
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(size):
            end, other_end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, other_end, timeout), daemon=True)
            process.start()
            self._ends.append(end)
            self._processes.append(process)

    def run(self, function, *arguments):
        """What `function(rank, *arguments)`, of a module that can be imported, returns on each rank."""
        self._runs += 1
        for end in self._ends:
            end.send((function, arguments, str(self._folder / f"run {self._runs}")))
        answers = []
        for rank, end in enumerate(self._ends):
            assert end.poll(2 * self._timeout), f"rank {rank} does not answer"
            result, failure = torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)
            answers.append((result, failure))
        failures = [f"rank {rank}:\n{failure}" for rank, (_, failure) in enumerate(answers) if failure is not None]
        assert not failures, "\n".join(failures)
        return [result for result, _ in answers]

    def close(self):
        """End the processes."""
        for end, process in zip(self._ends, self._processes, strict=True):
            if process.is_alive():
                end.send(None)
            process.join(self._timeout)
            process.kill()


def _serve(rank, size, end, timeout):
    torch.set_num_threads(1)
    while (job := end.recv()) is not None:
        function, arguments, meeting_point = job
        result, failure = None, None
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting_point}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
            result = function(rank, *arguments)
        except Exception:
            failure = traceback.format_exc()
        finally:
            dist.destroy_process_group()
        answer = io.BytesIO()
        torch.save((result, failure), answer)
        end.send_bytes(answer.getvalue())
