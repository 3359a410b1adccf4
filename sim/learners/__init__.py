"""What simulated peers learn: one module a `LearnerModel.kind`. Knows no world."""
