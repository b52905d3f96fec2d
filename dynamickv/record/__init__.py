"""What happened, without torch: the run record, the events that lead to it, agreement."""
