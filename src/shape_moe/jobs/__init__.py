"""What the verbs call: each job joins the packages above into one piece of work."""
