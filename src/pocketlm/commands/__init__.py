"""What a person can ask for besides `fit`, one module per kind of job."""
