"""What bases call things, as data: layouts that shapes cannot tell, and which head is tied to which embedding."""
