from server.finetune.training.observer import Evaluated, StepDone, TrainingLog


def history(train: list[float], valid: dict[int, float]) -> TrainingLog:
    made = TrainingLog()
    for i, loss in enumerate(train, start=1):
        made.steps.append(StepDone(i, len(train), loss, 0.5, 1.0, 1e-3, 10 * i, 0.1 * i))
        if i in valid:
            made.add_evaluation(i, valid[i], 0.5)
    return made


def test_the_best_is_the_first_of_the_lowest_losses() -> None:
    made = history([1.0] * 8, {2: 3.0, 4: 2.0, 6: 2.0, 8: 2.5})
    assert made.best == Evaluated(4, 2.0, 0.5, best=True)
    assert made.evaluations_since_best == 2
    assert [e.best for e in made.evaluations] == [True, True, False, False]


def test_without_a_step_there_is_nothing() -> None:
    made = TrainingLog()
    assert (made.step, made.tokens, made.seconds, made.best, made.evaluations_since_best, made.curve()) == (
        0,
        0,
        0,
        None,
        0,
        [],
    )
    assert not made.overfitted


def test_the_curve_has_the_mean_training_loss_since_the_last_evaluation() -> None:
    made = history([4.0, 2.0, 1.0, 0.0], {2: 3.0, 3: 2.0})
    assert made.curve() == [
        {"step": 2, "train_loss": 3.0, "valid_loss": 3.0},
        {"step": 3, "train_loss": 1.0, "valid_loss": 2.0},
    ]


def test_overfitted_is_better_on_the_training_data_and_worse_on_the_others() -> None:
    assert history([4.0, 3.0, 2.0, 1.0], {2: 2.0, 4: 2.5}).overfitted
    assert not history([4.0, 3.0, 4.0, 4.0], {2: 2.0, 4: 2.5}).overfitted
    assert not history([4.0, 3.0, 2.0, 1.0], {2: 2.0, 4: 2.01}).overfitted
    assert not history([4.0, 3.0, 2.0, 1.0], {2: 2.0, 4: 1.5}).overfitted
