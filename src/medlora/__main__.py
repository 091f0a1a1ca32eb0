from medlora.cli import main

main()
