"""What each update was worth: the round's game and estimators of its Shapley value."""
