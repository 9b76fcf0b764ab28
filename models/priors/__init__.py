"""Stage 2: one file a paper's network, and the schedules and samplers that they share."""
