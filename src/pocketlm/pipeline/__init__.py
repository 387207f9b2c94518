"""From a job to a proven artefact: finished stages, plans, trials, proof, the output folder."""
