"""Files of other tools: responses of inference servers, and the files of the method's reference implementation."""
