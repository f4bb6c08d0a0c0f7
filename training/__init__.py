"""The recipe of the small model that ships as `phrases`: synthetic and human voices to a checkpoint and a report."""
