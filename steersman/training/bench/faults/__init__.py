"""What becomes of requests when something breaks: `steersman bench faults`."""
