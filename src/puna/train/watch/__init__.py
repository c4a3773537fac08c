"""What a training tells about itself: times, memory, writers, profiles, held-out text."""
