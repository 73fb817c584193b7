def encode(*a, **k):
    raise SystemExit
