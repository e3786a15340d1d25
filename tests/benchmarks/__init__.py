"""Speed against named peers, in the same run; one JSON line a case. Not collected by pytest."""
