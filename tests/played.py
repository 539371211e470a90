"""Tune without processes: the trials of a sweep in the process of the test, one result at a time."""

from types import SimpleNamespace

from ray.tune.experiment import Trial as RayTrial


def ray_trial(trial_id, settings=None):
    """A trial of Tune's that has no directory."""
    return RayTrial("t", stub=True, trial_id=trial_id, config=settings)


class Played:
    """What stands for Tune's controller: the trials that the search algorithm hands out, and how one of them ends."""

    def __init__(self, search_alg):
        self.search_alg, self.scheduler = search_alg, search_alg.scheduler
        self.trials = []
        search_alg.add_configurations([SimpleNamespace(spec={})])

    def get_trials(self):
        return self.trials

    def get_live_trials(self):
        return [trial for trial in self.trials if trial.status != RayTrial.TERMINATED]

    def stop_trial(self, trial):
        if trial.status == RayTrial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
        else:
            self.scheduler.on_trial_remove(self, trial)
        self.search_alg.on_trial_complete(trial.trial_id)
        trial.set_status(RayTrial.TERMINATED)

    def take_new(self):
        """Add the trials that there is room for."""
        while (trial := self.search_alg.next_trial()) is not None:
            self.trials.append(trial)
            self.scheduler.on_trial_add(self, trial)
