"""What a run and the other modes do around the iteration: open, encode, evaluate, guard, save, log, export."""
